fn is_counted(row: u32, col: u32) -> bool {
    let code = (rows[row * ((COLS + 3u) / 4u) + col / 4u] >> (8u * (col % 4u))) & 0xffu;
    return (code & 0x7fu) == 0x7eu;
}
