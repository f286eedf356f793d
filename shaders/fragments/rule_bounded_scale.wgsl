// NaN stands above infinity, and stays.
fn raw_scale(amax: u32) -> u32 {
    let ratio = divide(amax, CODE_MAX_BITS);
    let bounded = select(min(ratio, SCALE_UPPER_BITS), ratio, ratio > INFINITE);
    return max(bounded, SCALE_FLOOR_BITS);
}
