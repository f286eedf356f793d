const WEIGHTS_PER_VEC: u32 = 4u;
const WEIGHT_FACTOR: f32 = 1.0;

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(words);
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return bitcast<f32>(word);
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
