// E4M3FN. No f32 subnormal is formed on the way. Twin: numerics::decode_e4m3.
fn decode_e4m3(code: u32) -> f32 {
    let magnitude = code & 0x7fu;
    let shifted = bitcast<f32>((magnitude << 20u) + 0x3c000000u);
    let value = select(shifted, 2.0 * (shifted - 0.0078125), magnitude < 8u);
    let bits = bitcast<u32>(value) | ((code & 0x80u) << 24u);
    return bitcast<f32>(select(bits, 0x7fc00000u, magnitude == 0x7fu));
}
