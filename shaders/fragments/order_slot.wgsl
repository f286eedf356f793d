// The slot behind `previous`; -1 begins.
fn next_slot(base: u32, previous: i32) -> i32 {
    return previous + 1;
}
