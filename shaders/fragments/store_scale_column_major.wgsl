fn store_scale(row: u32, span: u32, bits: u32) {
    scales[span * SCALE_STRIDE + row] = bits;
}
