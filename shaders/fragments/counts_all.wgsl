fn counts(row: u32) -> bool {
    return true;
}
