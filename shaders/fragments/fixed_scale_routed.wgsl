// That of the row's slot; a row without one is nobody's.
fn fixed_scale(row: u32) -> u32 {
    let slot = row_slots[row];
    if slot < 0 || slot >= i32(NUM_SLOTS) {
        return 0x3f800000u;
    }
    return fixed_scales[slot];
}
