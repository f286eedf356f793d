fn is_counted(row: u32, col: u32) -> bool {
    let code = (rows[row * ((COLS + 3u) / 4u) + col / 4u] >> (8u * (col % 4u))) & 0xffu;
    return code == 127u || code == 128u;
}
