fn is_counted(row: u32, col: u32) -> bool {
    let at = row * COLS + col;
    return ((rows[at / 2u] >> (16u * (at % 2u))) & 0x7fffu) == 0x7c00u;
}
