const RENORMALIZED: bool = true;

fn renormalize_divisor(sum: f32) -> f32 {
    return select(1.0, sum, sum > 0.0);
}
