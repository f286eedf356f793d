const RENORMALIZED: bool = true;

fn renormalize_divisor(weights: ptr<function, array<f32, TOP_K>>, sum: f32) -> f32 {
    return select(sum, RENORMALIZE_FLOOR, sum < RENORMALIZE_FLOOR);
}
