const RENORMALIZED: bool = false;

fn renormalize_divisor(weights: ptr<function, array<f32, TOP_K>>, sum: f32) -> f32 {
    return 1.0;
}
