fn span_factor(amax: u32, scale: u32) -> u32 {
    return divide(0x3f800000u, scale);
}

fn quotient(magnitude: u32, factor: u32) -> u32 {
    return multiply(magnitude, factor);
}
