const INPUT_FACTOR: f32 = E4M3_FACTOR;

fn direct_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    return four_e4m3(words[quad]);
}

fn direct_nans(words: vec4<u32>) -> u32 {
    return e4m3_nans(words.x) | e4m3_nans(words.y) | e4m3_nans(words.z) | e4m3_nans(words.w);
}
