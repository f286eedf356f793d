fn store_scale(row: u32, span: u32, bits: u32) {
    scales[row * SPANS + span] = bits;
}
