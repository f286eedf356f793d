// -1: no contribution. Any other value that is no slot (an id that cannot be selected, an expert that is nowhere, a
// token outside of the hash table) makes the row NaN: it is a fault, and never a silent zero.
fn is_missed(token: u32) -> bool {
    var missed = false;
    for (var slot = token * TOP_K; slot < (token + 1u) * TOP_K; slot++) {
        missed = missed || row_slots[slot] < -1 || row_slots[slot] >= i32(SELECTABLE);
    }
    return missed;
}

fn routed_sum(token: u32, col: u32) -> f32 {
    var sum = 0.0;
    var previous = -1;
    for (var step = 0u; step < TOP_K; step++) {
        previous = next_slot(token * TOP_K, previous);
        let slot = token * TOP_K + u32(previous);
        let chosen = row_slots[slot];
        // Read whether it counts or not, so that the reads of all slots are under way together.
        let row = expert_value(slot * HIDDEN_SIZE + col);
        if chosen >= i32(NUM_SLOTS) {
            sum = add_zero_expert(sum, slot, token * HIDDEN_SIZE + col);
        } else if chosen >= 0 {
            sum = round_step(sum + weighted_row(output_weight(slot), row));
        }
    }
    return sum;
}
