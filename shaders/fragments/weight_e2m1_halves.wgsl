// E2M1 codes as binary16, which has the same fields with a bias larger by 14: exact where the device unpacks each
// binary16 exactly.
const WEIGHTS_PER_VEC: u32 = 32u;
const WEIGHT_FACTOR: f32 = 16384.0;

// Codes `which` and `which + 4` of a word.
fn two_e2m1(word: u32, which: u32) -> vec2<f32> {
    let codes = word >> (4u * which);
    return unpack2x16float(((codes & 0x00080008u) << 12u) | ((codes & 0x00070007u) << 9u));
}

// The two quads of a word share their pairs.
fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let word = words[quad / 2u];
    let a = two_e2m1(word, 0u);
    let b = two_e2m1(word, 1u);
    let c = two_e2m1(word, 2u);
    let d = two_e2m1(word, 3u);
    if quad % 2u == 0u {
        return vec4<f32>(a.x, b.x, c.x, d.x);
    }
    return vec4<f32>(a.y, b.y, c.y, d.y);
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}

// One of the weights of a word, times nothing.
fn weight_one(word: u32, which: u32) -> f32 {
    return WEIGHT_FACTOR * two_e2m1(word >> (4u * which), 0u).x;
}
