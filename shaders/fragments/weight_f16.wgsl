const WEIGHTS_PER_VEC: u32 = 8u;
const WEIGHT_FACTOR: f32 = 1.0;

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let pair = vec2<u32>(words[2u * quad], words[2u * quad + 1u]);
    return vec4<f32>(
        decode_f16(pair.x & 0xffffu),
        decode_f16(pair.x >> 16u),
        decode_f16(pair.y & 0xffffu),
        decode_f16(pair.y >> 16u),
    );
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return decode_f16((word >> (16u * which)) & 0xffffu);
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
