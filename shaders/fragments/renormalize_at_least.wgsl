const RENORMALIZED: bool = true;

fn renormalize_divisor(sum: f32) -> f32 {
    return select(sum, RENORMALIZE_FLOOR, sum < RENORMALIZE_FLOOR);
}
