const WEIGHTS_PER_VEC: u32 = 8u;
const WEIGHT_FACTOR: f32 = 1.0;

// Where the device unpacks each binary16 exactly.
fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(words[2u * quad]), unpack2x16float(words[2u * quad + 1u]));
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return unpack2x16float(word >> (16u * which)).x;
}
