// The low 16 bits as binary16. Integer and exact f32 arithmetic only: no subnormal is formed, so a
// device that flushes them still decodes every code exactly. Twin: numerics::decode_f16.
fn decode_f16(half: u32) -> f32 {
    let magnitude = half & 0x7fffu;
    let sign = (half & 0x8000u) << 16u;
    let shifted = (magnitude << 13u) + 0x38000000u;
    if magnitude >= 0x7c00u {
        return bitcast<f32>((shifted + 0x38000000u) | sign);
    }
    if magnitude < 0x400u {
        // m * 2^-24 as (1 + m / 1024) * 2^-14 - 2^-14.
        let value = bitcast<f32>(shifted + 0x800000u) - 0.00006103515625;
        return bitcast<f32>(bitcast<u32>(value) | sign);
    }
    return bitcast<f32>(shifted | sign);
}
