fn raw_scale(amax: u32) -> u32 {
    return multiply(max(amax, AMAX_FLOOR_BITS), CODE_MAX_RECIPROCAL_BITS);
}
