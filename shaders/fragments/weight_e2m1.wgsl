const WEIGHTS_PER_VEC: u32 = 32u;
const WEIGHT_FACTOR: f32 = 1.0;

// E2M1 in the low four bits: below 1 twice what lies above 0.5. Twin: numerics::decode_e2m1.
fn decode_e2m1(code: u32) -> f32 {
    let magnitude = code & 7u;
    let shifted = bitcast<f32>((magnitude << 22u) + 0x3f000000u);
    let value = select(shifted, 2.0 * (shifted - 0.5), magnitude < 2u);
    return bitcast<f32>(bitcast<u32>(value) | ((code & 8u) << 28u));
}

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let codes = words[quad / 2u] >> (16u * (quad % 2u));
    return vec4<f32>(
        decode_e2m1(codes),
        decode_e2m1(codes >> 4u),
        decode_e2m1(codes >> 8u),
        decode_e2m1(codes >> 12u),
    );
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return decode_e2m1(word >> (4u * which));
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
