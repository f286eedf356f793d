const VALUES_PER_WORD: u32 = 2u;

// Round to nearest even on bits; overflow carries into infinity, NaN stays NaN.
fn encode(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
