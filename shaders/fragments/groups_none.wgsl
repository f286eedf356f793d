fn allow_groups(index: u32) {}

fn is_allowed(e: u32) -> bool {
    return true;
}
