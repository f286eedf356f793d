// Rows that the second GEMM has weighted and rounded.
fn expert_value(at: u32) -> f32 {
    let word = expert_out[at / 2u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, at % 2u == 1u));
}
