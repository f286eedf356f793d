const WEIGHTS_PER_VEC: u32 = 16u;

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let word = words[quad];
    return vec4<f32>(
        decode_e4m3(word & 0xffu),
        decode_e4m3((word >> 8u) & 0xffu),
        decode_e4m3((word >> 16u) & 0xffu),
        decode_e4m3(word >> 24u),
    );
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return decode_e4m3((word >> (8u * which)) & 0xffu);
}
