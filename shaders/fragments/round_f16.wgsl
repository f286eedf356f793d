// To the model's type and back. Twin: numerics::round_to.
fn round_model(value: f32) -> f32 {
    return decode_f16(encode_f16(bitcast<u32>(value)));
}
