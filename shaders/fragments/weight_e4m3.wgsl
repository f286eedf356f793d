const WEIGHTS_PER_VEC: u32 = 16u;
// What a sum of products lacks.
const WEIGHT_FACTOR: f32 = E4M3_FACTOR;

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    return four_e4m3(words[quad]);
}

// Not zero if a weight is NaN that `weight_quad` does not show.
fn weight_nans(words: vec4<u32>) -> u32 {
    return e4m3_nans(words.x) | e4m3_nans(words.y) | e4m3_nans(words.z) | e4m3_nans(words.w);
}

// One of the weights of a word, times nothing.
fn weight_one(word: u32, which: u32) -> f32 {
    return decode_e4m3((word >> (8u * which)) & 0xffu);
}
