const INPUT_FACTOR: f32 = 1.0;

fn direct_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let pair = vec2<u32>(words[2u * quad], words[2u * quad + 1u]);
    return bitcast<vec4<f32>>(vec4<u32>(pair.x << 16u, pair.x & 0xffff0000u, pair.y << 16u, pair.y & 0xffff0000u));
}

fn direct_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
