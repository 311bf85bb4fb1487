"""Real captions, where they lie beside the checkout, and captions made up to be hard to split."""

import json
import random
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared"


def coco():
    """Captions of each COCO val2017 image."""
    file = SHARED / "coco" / "annotations" / "captions_val2017.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    images = {}
    for annotation in json.loads(file.read_text())["annotations"]:
        images.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return images


def flickr8k():
    """Captions of each Flickr8k image."""
    file = SHARED / "flickr8k" / "dataset_flickr8k.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    return {
        image["filename"]: [sentence["raw"] for sentence in image["sentences"]]
        for image in json.loads(file.read_text())["images"]
    }


def leave_one_out(images):
    """The first caption of each image, and the others as its references."""
    return {image: texts[1:] for image, texts in images.items()}, {image: texts[0] for image, texts in images.items()}


_NOUNS = "man woman dog cat bus train pizza kite horse child people skateboard umbrella laptop giraffe bench".split()
_WORDS = "red small wooden busy old striped young three several snowy".split()
_VERBS = "sits rides holds is playing with stands next to looks at jumps over eats walks past".split()
_HARD = """
    mr. Mrs. dr. St. Ave. inc. no. fig. vs. etc. e.g. i.e. a.m. P.M. U.S. U.S.A. T.V. D.C. co. ltd. Jan. Sept. Mt. Ph.D.
    Jr. lbs. ft. approx. w. B. J.R.R. Wash. La. oz. B.C. M&M's AT&T b&w don't can't isn't it's they're we've I'd y'all
    o'clock rock'n'roll 'em 'til 90's '90s '57 dogs' cannot gonna wanna 'tis 'twas ain't D'Angelo O'Brien n't 'n' C'mon
    ol' li'l goin' 1 10 747 1990s 1st 22nd 1/2 3/4 24/7 5:30 3pm 5.5 1,000 $5 $5.00 £3 50% #1 50-50 2x4 6'2" 555-1234
    9/11 3-4 007 .22 5-year-old 20th-century B-52 4WD No.5 360° ½ 2½ 16:9 www.foo.com http://foo.com/bar?x=1 me@foo.com
    @home #tag photo.jpg and/or w/ :) :-( <3 <b> &amp; &quot; c++ C# ok! x-ray T-shirts black-and-white -LRB- (left)
    [sic] "STOP" 'STOP' stop." stop". (right). and... ...and man,woman man.Woman dog;cat word:word _blank_ *wow* ~5
    100ft. hi!there e-mail. etc.) U.S., Mr.Smith café naïve soft\u00adhyphen it’s “quoted” ‘so’ — – … 😀 ™ ® ×
""".split()
_MARKS = [*"!?.,;:-'\"()[]{}/\\&@#$%*_+=~|<>’“”–…é\u00a0°•", "...", "..", "--"]


def made_up(count, seed):
    """Captions that are hard to split, always the same ones."""
    choose = random.Random(seed)
    captions = []
    for _ in range(count):
        words = ["A", choose.choice(_WORDS), choose.choice(_NOUNS), choose.choice(_VERBS), "the", choose.choice(_NOUNS)]
        for _ in range(choose.randint(1, 5)):
            place = choose.randrange(len(words))
            change = choose.randrange(8)
            if change == 0:
                words[place] += choose.choice(_MARKS)
            elif change == 1:
                words[place] = choose.choice(_MARKS) + words[place]
            elif change == 2:
                words[place] = choose.choice([words[place].upper(), words[place].capitalize()])
            elif change == 3:
                middle = choose.randint(0, len(words[place]))
                words[place] = words[place][:middle] + choose.choice(_MARKS) + words[place][middle:]
            elif change == 4:
                words[place] = choose.choice([words[place] + choose.choice(_HARD), choose.choice(_HARD) + words[place]])
            else:
                words.insert(place, choose.choice(_HARD))
        captions.append(" ".join(words) + choose.choice(["", ".", " .", "!", ". "]))
    return captions
