const VALUES_PER_WORD: u32 = 2u;

fn encode(bits: u32) -> u32 {
    return encode_f16(bits);
}
