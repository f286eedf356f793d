fn is_counted(row: u32, col: u32) -> bool {
    return (rows[row * COLS + col] & 0x7f800000u) == 0x7f800000u;
}
