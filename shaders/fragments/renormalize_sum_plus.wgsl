const RENORMALIZED: bool = true;

fn renormalize_divisor(sum: f32) -> f32 {
    return sum + RENORMALIZE_EPS;
}
