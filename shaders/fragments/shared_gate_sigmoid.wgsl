// There is one shared MLP: its index is the token's.
fn shared_factor(mlp: u32) -> f32 {
    return keep_nan(shared_gate[mlp], sigmoid(shared_gate[mlp]));
}
