// Four E4M3 codes of a word, each built from its bits: right on every device.
const E4M3_FACTOR: f32 = 1.0;

fn four_e4m3(word: u32) -> vec4<f32> {
    return vec4<f32>(
        decode_e4m3(word & 0xffu),
        decode_e4m3((word >> 8u) & 0xffu),
        decode_e4m3((word >> 16u) & 0xffu),
        decode_e4m3(word >> 24u),
    );
}

// Not zero if the values do not say that a code is NaN.
fn e4m3_nans(word: u32) -> u32 {
    return 0u;
}
