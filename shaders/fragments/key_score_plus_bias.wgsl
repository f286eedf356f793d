// Beside a bias, a subnormal score is nothing.
fn selection_key(base: u32, e: u32, subnormal: u32) -> u32 {
    let key = scores[e] + selection_bias[e];
    return select(order_key(key), 0u, is_nan(key));
}
