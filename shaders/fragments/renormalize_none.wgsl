const RENORMALIZED: bool = false;

fn renormalize_divisor(sum: f32) -> f32 {
    return 1.0;
}
