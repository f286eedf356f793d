// Rows stand in order of slot, CAPACITY for each, of which the first counts[slot] exist.
fn assigned(row: u32) -> i32 {
    let at = params.first_token + row;
    let slot = at / CAPACITY;
    return select(-1, i32(slot), at % CAPACITY < counts[slot]);
}
