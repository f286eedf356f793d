// f32 bits to bfloat16 bits: nearest even; overflow carries into infinity, NaN stays NaN.
fn encode_bf16(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
