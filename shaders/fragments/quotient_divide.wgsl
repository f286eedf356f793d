fn span_factor(amax: u32, scale: u32) -> u32 {
    return scale;
}

fn quotient(magnitude: u32, factor: u32) -> u32 {
    return divide(magnitude, factor);
}
