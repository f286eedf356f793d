fn group_member_key(e: u32) -> u32 {
    return select(order_key(scores[e]), 0u, keys[e] == 0u);
}

fn group_judgement(first: u32, second: u32) -> u32 {
    return first;
}
