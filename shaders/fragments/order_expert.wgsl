// The slot behind `previous` in order of (id, slot); -1 begins.
fn next_slot(base: u32, previous: i32) -> i32 {
    var best = -1;
    for (var slot = 0; slot < i32(TOP_K); slot++) {
        let id = order_of(base + u32(slot));
        var later = true;
        if previous >= 0 {
            let last = order_of(base + u32(previous));
            later = id > last || (id == last && slot > previous);
        }
        if later && (best < 0 || id < order_of(base + u32(max(best, 0)))) {
            best = slot;
        }
    }
    return best;
}
