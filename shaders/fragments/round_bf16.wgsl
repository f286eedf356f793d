// To the model's type and back. Twin: numerics::round_to.
fn round_model(value: f32) -> f32 {
    return bitcast<f32>(encode_bf16(bitcast<u32>(value)) << 16u);
}
