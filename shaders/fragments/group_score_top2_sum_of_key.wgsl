fn group_member_key(e: u32) -> u32 {
    return keys[e];
}

fn group_judgement(first: u32, second: u32) -> u32 {
    let sum = from_order_key(first) + from_order_key(second);
    return select(order_key(sum), 0u, second == 0u || is_nan(sum));
}
