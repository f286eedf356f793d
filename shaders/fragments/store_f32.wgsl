const VALUES_PER_WORD: u32 = 1u;

fn encode(bits: u32) -> u32 {
    return bits;
}
