fn selection_key(base: u32, e: u32, subnormal: u32) -> u32 {
    return select(order_key(scores[e]), subnormal | 0x80000000u, subnormal != 0u);
}
