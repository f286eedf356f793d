fn raw_scale(amax: u32) -> u32 {
    return max(divide(amax, CODE_MAX_BITS), SCALE_FLOOR_BITS);
}
