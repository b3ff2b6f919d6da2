use super::*;

#[test]
fn blocks_are_zeroed_and_aligned() {
    for bytes in [0, 1, 63, 4096, LARGE - 1, LARGE, LARGE + 12345] {
        let mut block = Block::zeroed(bytes).unwrap();
        assert_eq!(block.address() % ALIGN, 0);
        assert_eq!(block.bytes(), bytes);
        let data = block.as_mut_slice::<f32>();
        assert!(data.iter().all(|&x| x.to_bits() == 0));
        data.fill(1.0);
    }
}

#[test]
fn lasting_blocks_lie_side_by_side_and_outlive_each_other() {
    let first = Block::lasting(100).unwrap();
    let mut second = Block::lasting(3 << 20).unwrap();
    assert_eq!(second.address(), first.address() + 128);
    assert!(second.as_mut_slice::<f32>().iter().all(|&x| x.to_bits() == 0));
    drop(first);
    second.as_mut_slice::<f32>().fill(1.0);
    // Too large for what is left of the chunk, and for any.
    let others = [CHUNK / 2, CHUNK / 2, CHUNK / 2 + 1, 0].map(|bytes| Block::lasting(bytes).unwrap());
    assert!(others.iter().all(|block| block.address() % ALIGN == 0));
    drop(others);
    assert!(second.as_mut_slice::<f32>().iter().all(|&x| x == 1.0));
    assert!(matches!(Block::lasting(usize::MAX), Err(Error::Memory { .. })));
}

#[test]
fn absurd_sizes_are_errors() {
    assert!(matches!(Block::zeroed(usize::MAX), Err(Error::Memory { .. })));
    assert!(matches!(Block::zeroed(1 << 62), Err(Error::Memory { .. })));
    assert!(matches!(tensor(DType::F32, usize::MAX / 2, 3), Err(Error::Memory { .. })));
    assert!(matches!(Scratch::default().lock(1 << 62), Err(Error::Memory { .. })));
}

#[test]
fn rows_follow_strides() {
    let mut t = tensor(DType::F32, 3, 5).unwrap();
    let mut all = RowsMut::<f32>::new(t.view_mut());
    for r in 0..3 {
        for (c, x) in all.row_mut(r).iter_mut().enumerate() {
            *x = (r * 10 + c) as f32;
        }
    }
    let middle = Rows::<f32>::new(t.view().cols_range(1..4).rows_range(1..3));
    assert_eq!((middle.rows(), middle.cols(), middle.stride()), (2, 3, 5));
    assert_eq!(middle.row(1), [21.0, 22.0, 23.0]);
    assert_eq!(Rows::<f32>::new(t.view()).all().len(), 15);
}

#[test]
#[should_panic(expected = "another type")]
fn a_wrong_type_is_a_bug() {
    let t = tensor(DType::Bf16, 1, 1).unwrap();
    Rows::<f32>::new(t.view());
}

#[test]
fn scratch_grows_once_and_nests() {
    let scratch = Scratch::default();
    let first = scratch.lock(1000).unwrap().as_mut_slice::<bf16>().as_ptr() as usize;
    let again = scratch.lock(10).unwrap().as_mut_slice::<bf16>().as_ptr() as usize;
    assert_eq!(first, again);
    let addresses = || {
        with_local_scratch::<f32, _>(100, |outer| {
            outer.fill(1.0);
            let inner = with_local_scratch::<f32, _>(5000, |inner| {
                inner.fill(2.0);
                inner.as_ptr() as usize
            });
            assert!(outer.iter().all(|&x| x == 1.0));
            (outer.as_ptr() as usize, inner)
        })
    };
    assert_eq!(addresses(), addresses());
}
