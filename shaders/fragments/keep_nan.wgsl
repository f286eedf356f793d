// `bounded`, but NaN where `value` is NaN: on bits, since a compiler may turn comparisons into min and max.
fn keep_nan(value: f32, bounded: f32) -> f32 {
    let bits = bitcast<u32>(value);
    return bitcast<f32>(select(bitcast<u32>(bounded), bits, (bits & 0x7fffffffu) > 0x7f800000u));
}
