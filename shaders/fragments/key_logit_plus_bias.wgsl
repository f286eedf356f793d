fn selection_key(base: u32, e: u32, subnormal: u32) -> u32 {
    let key = logit_at(base + e) + selection_bias[e];
    return select(order_key(key), 0u, is_nan(key));
}
