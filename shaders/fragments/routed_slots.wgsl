// id -1: no contribution. Any other id that cannot be selected (-2: the token is outside of the hash table)
// makes the row NaN: it is a fault, and never a silent zero.
fn is_missed(token: u32) -> bool {
    var missed = false;
    for (var slot = token * TOP_K; slot < (token + 1u) * TOP_K; slot++) {
        missed = missed || topk_ids[slot] < -1 || topk_ids[slot] >= i32(SELECTABLE);
    }
    return missed;
}

fn routed_sum(token: u32, col: u32) -> f32 {
    var sum = 0.0;
    var previous = -1;
    for (var step = 0u; step < TOP_K; step++) {
        previous = next_slot(token * TOP_K, previous);
        let slot = token * TOP_K + u32(previous);
        let id = topk_ids[slot];
        if id >= i32(NUM_EXPERTS) {
            sum = add_zero_expert(sum, slot, token * HIDDEN_SIZE + col);
        } else if id >= 0 {
            sum = round_step(sum + weighted_row(output_weight(slot), expert_out[slot * HIDDEN_SIZE + col]));
        }
    }
    return sum;
}
