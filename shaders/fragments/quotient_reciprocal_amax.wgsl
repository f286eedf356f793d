fn span_factor(amax: u32, scale: u32) -> u32 {
    return divide(CODE_MAX_BITS, max(amax, AMAX_FLOOR_BITS));
}

fn quotient(magnitude: u32, factor: u32) -> u32 {
    return multiply(magnitude, factor);
}
