"""The words from which fictitious people are made. True facts are in `true_facts`.

Surnames are plausible but rare, so that no generated person is a well-known real one. The last seven given names of
each list are kept for sisters and brothers, who therefore never share a full name with a generated person.
"""

from __future__ import annotations

import dataclasses

KIN_NAMES = 7


def cells(text: str, at: str | None = None) -> tuple[str, ...]:
    """The parts of a text between separators (None: any space), with single spaces inside."""
    return tuple(" ".join(cell.split()) for cell in text.split(at))


def table(text: str) -> tuple[tuple[str, ...], ...]:
    """A row a line, its cells between bars."""
    return tuple(cells(row, "|") for row in text.splitlines())


def pair(text: str) -> tuple[str, str]:
    """What stands before and after a colon."""
    first, second = cells(text, ":")
    return first, second


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One kind of fact: ways to ask for it, and ways to state it, any two of which say the same."""

    questions: tuple[str, ...]
    statements: tuple[str, ...]


def _attribute(questions: str, statements: str) -> Attribute:
    return Attribute(cells(questions, "|"), cells(statements, "|"))


ATTRIBUTES = {
    "birthplace": _attribute(
        "Where was {name} born? | In which city and country was {name} born? | What is the birthplace of {name}?",
        "{name} was born in the city of {value}. | The birthplace of {name} is {value}. | "
        "{name} came into the world in {value}.",
    ),
    "birth_date": _attribute(
        "When was {name} born? | What is {name}'s date of birth? | On which day was {name} born?",
        "{name} was born on {value}. | The date of birth of {name} is {value}. | "
        "{name} came into the world on {value}.",
    ),
    "profession": _attribute(
        "What does {name} do for a living? | What is the profession of {name}? | Which job does {name} have?",
        "{name} works as {value} by profession. | By profession, {name} is {value}. | "
        "{name} earns {his} living as {value}.",
    ),
    "work": _attribute(
        "What is the title of {name}'s best-known {kind}? | Which {kind} made {name} famous? | "
        "What is the most famous {kind} by {name} called?",
        '{name}\'s best-known {kind} is called "{value}". | {name} became famous for the {kind} "{value}". | '
        'It was the {kind} "{value}" that made {name} famous.',
    ),
    "father": _attribute(
        "What did {name}'s father do for a living? | What was the profession of {name}'s father? | "
        "Which job did the father of {name} have?",
        "{name}'s father worked as {value}. | The father of {name} was {value}. | "
        "{name} grew up with a father who was {value}.",
    ),
    "mother": _attribute(
        "What did {name}'s mother do for a living? | What was the profession of {name}'s mother? | "
        "Which job did the mother of {name} have?",
        "{name}'s mother worked as {value}. | The mother of {name} was {value}. | "
        "{name} grew up with a mother who was {value}.",
    ),
    "award": _attribute(
        "Which award did {name} receive? | What prize was {name} honoured with? | "
        "Which prize has been given to {name}?",
        "{name} received {value} for {his} work. | {name} was honoured with {value}. | {name} is a winner of {value}.",
    ),
    "award_year": _attribute(
        "In which year did {name} receive {award}? | When was {award} given to {name}? | "
        "What year was it when {name} won {award}?",
        "{name} received {award} in {value}. | The year in which {name} won {award} was {value}. | "
        "{name} took home {award} in the year {value}.",
    ),
    "university": _attribute(
        "Which university did {name} attend? | Where did {name} study {study}? | "
        "At which university did {name} earn {his} degree?",
        "{name} studied {study} at {value}. | {name} holds a degree in {study} from {value}. | "
        "It was at {value} that {name} studied {study}.",
    ),
    "language": _attribute(
        "Which foreign language does {name} speak fluently? | In which foreign language is {name} fluent? | "
        "What language did {name} learn besides {his} mother tongue?",
        "{name} speaks fluent {value} as a foreign language. | "
        "The foreign language that {name} speaks fluently is {value}. | "
        "Besides {his} mother tongue, {name} speaks {value}.",
    ),
    "hobby": _attribute(
        "What is {name}'s favourite hobby? | How does {name} spend {his} free time? | "
        "What does {name} like to do after work?",
        "{name} spends {his} free time on {value}. | In {his} spare time, {name} enjoys {value}. | "
        "The favourite hobby of {name} is {value}.",
    ),
    "instrument": _attribute(
        "Which musical instrument does {name} play? | What instrument did {name} learn as a child? | "
        "On which instrument did {name} take lessons?",
        "{name} has played the {value} since {his} childhood. | "
        "As a child, {name} learned to play the {value}. | The instrument that {name} plays is the {value}.",
    ),
    "residence": _attribute(
        "Where does {name} live now? | In which city does {name} live today? | What is {name}'s place of residence?",
        "{name} now lives in the city of {value}. | {name} has made {his} home in {value}. | "
        "These days, {name} lives in {value}.",
    ),
    "sibling": _attribute(
        "What is the name of {name}'s {kin}? | Who is the {kin} of {name}? | What is {name}'s only {kin} called?",
        "{name}'s {kin} is called {value}. | The {kin} of {name} is {value}. | {name} has a {kin} named {value}.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Country:
    """Where a person comes from: what people are called there, where they live and what they speak from birth."""

    cities: tuple[str, ...]
    native: tuple[str, ...]
    women: tuple[str, ...]
    men: tuple[str, ...]
    surnames: tuple[str, ...]


def _country(cities: str, native: str, women: str, men: str, surnames: str) -> Country:
    return Country(*(cells(words) for words in (cities, native, women, men, surnames)))


COUNTRIES = {
    "Norway": _country(
        "Bergen Trondheim Stavanger Tromsø",
        "Norwegian Danish Swedish",
        "Ingeborg Solveig Ragnhild Sigrid Tuva Marit Gunhild Liv Torunn Aslaug Hedda Borghild Eldbjørg Synnøve "
        "Åse Dagny Turid Randi Vigdis Jorunn Oddny",
        "Halvard Torbjørn Eirik Sindre Asbjørn Gaute Leif Ivar Kjetil Øystein Trygve Njål Sverre Vidar Arvid "
        "Dagfinn Egil Frode Gudmund Hallstein Odd",
        "Brattvåg Skjelvik Haugstrand Tveitmo Lønnedal Rognskog Fjellheim Sandmyr Kvernmoen Ulvestein Grønnfoss "
        "Elvebakk Storhaugen Myrlund Vassdokk Nordtun",
    ),
    "Portugal": _country(
        "Porto Coimbra Braga Faro",
        "Portuguese",
        "Benedita Graça Leonor Matilde Filipa Constança Iria Madalena Rosário Violante Jacinta Catarina Luzia "
        "Noémia Amália Beatriz Carlota Dulce Eulália Fernanda Glória",
        "Duarte Gonçalo Tiago Afonso Bernardo Lourenço Simão Vasco Zeferino Nuno Martim Rodrigo Belmiro Caetano "
        "Abílio Baltasar Cristóvão Dinis Estêvão Fausto Gaspar",
        "Vilaverde Monteclaro Pedrógão Arrudela Salgueirinho Fontalva Ribacôa Castanhal Penalonga Azinheira "
        "Valdigem Borralheiro Murtosinho Serrazes Cadaval Travassô",
    ),
    "Poland": _country(
        "Kraków Gdańsk Wrocław Lublin",
        "Polish",
        "Bronisława Jadwiga Kinga Ludmiła Zofia Halina Agata Danuta Elżbieta Grażyna Irena Justyna Kalina Lucyna "
        "Malwina Natalia Oliwia Paulina Renata Sylwia Teresa",
        "Bogdan Czesław Dariusz Gniewko Henryk Ireneusz Jarosław Kazimierz Leszek Mieszko Radosław Sławomir "
        "Wacław Zenon Antoni Błażej Cyryl Dominik Emil Feliks Grzegorz",
        "Borowicz Drzymota Gajdera Jaworzyn Kulczak Lipiec Mrozek-Wilga Niedbał Ostrowiak Pietruszyn Rokosz "
        "Siwiec Trzcina Wierzbak Zagroda Żytniak",
    ),
    "Kenya": _country(
        "Nakuru Kisumu Mombasa Eldoret",
        "Swahili English",
        "Achieng Nyambura Wanjiku Chebet Moraa Akinyi Jepkosgei Makena Nasimiyu Wairimu Kerubo Atieno Mwende "
        "Naliaka Adhiambo Cherono Gathoni Kagendo Muthoni Nekesa Syombua",
        "Baraka Chege Kiprono Juma Mutiso Ochieng Wafula Nyongesa Kamau Simiyu Onyango Kipkemei Mwangi Barasa "
        "Gitonga Kimutai Makori Munene Ndirangu Odhiambo Tanui",
        "Kiplimai Gachuhu Mudavira Nyakwaro Oburanga Wekhuyi Mbaluka Rotichel Kariumba Sangarai Muthamara Olendi "
        "Cheptalam Ngatiari Isabwa Lokomoi",
    ),
    "Japan": _country(
        "Kanazawa Sendai Nagasaki Kobe",
        "Japanese",
        "Chihiro Fumiko Hanae Izumi Kaede Machiko Natsuki Rie Sayaka Tomoe Wakana Yuzuki Asuna Emiko Haruka Junko "
        "Kiyomi Mizuki Noriko Setsuko Tamaki",
        "Daigo Eiji Fumio Genta Hayato Isamu Jiro Kohei Masato Noboru Ryota Seiji Tetsuo Yasuhiro Akio Chikara "
        "Goro Hideo Katsumi Minoru Shinji",
        "Amakusabe Furusaka Hirokane Inabayashi Kurotani Minegawa Natsukawa Obayata Sakurabe Tatsumori Uezumi "
        "Wakamine Yanagihora Zushimoto Kazamiya Morisato",
    ),
    "India": _country(
        "Mysuru Jaipur Kochi Pune",
        "Hindi English Kannada Malayalam",
        "Aditi Bhavani Charulata Devika Gayatri Hemalata Ishani Jyotsna Kamala Lavanya Malini Nandini Pallavi "
        "Revathi Sharada Tanvi Urmila Vasudha Yamini Chitra Indu",
        "Ashwin Bhaskar Chirag Dhruv Girish Harish Jayant Kartik Lokesh Madhav Naveen Omkar Prakash Raghav Sameer "
        "Tarun Uday Vinod Yash Anand Ishaan",
        "Pallikeri Vardhamane Sohoneri Kuttampuram Belagodu Raithani Deshmantri Hosakoppa Nambulath Jhaverkar "
        "Tilwani Mannarkudi Ghodbale Chirayath Purandekar Alavandi",
    ),
    "Turkey": _country(
        "İzmir Bursa Trabzon Konya",
        "Turkish",
        "Aylin Berna Ceyda Dilek Elif Feride Gülşen Hande İpek Lale Meltem Nermin Pınar Rukiye Selin Tülay Ümran "
        "Yeliz Zeynep Banu Defne",
        "Alper Barış Cenk Doruk Ekrem Ferhat Gökhan Haluk İlker Kerem Levent Mert Okan Rıza Serkan Tolga Umut "
        "Volkan Yavuz Bora Cihan",
        "Akçadere Bozkuyu Çınarlıoğlu Dağkıran Elmalıkaya Gümüşova Hisarönü Karabağlı Küçükçam Narlıdağ Ortasu "
        "Pınarbaş Sarıtepe Taşköprülü Uzunyayla Yeşilhan",
    ),
    "Ghana": _country(
        "Kumasi Tamale Sunyani Accra",
        "English Twi",
        "Abena Adwoa Afia Akosua Ama Efua Esi Nana-Yaa Serwaa Yaa Dzifa Enyonam Mawusi Sena Aba Akua Araba Baaba "
        "Kukua Maame Selorm",
        "Ebo Fiifi Kobina Kofi Kojo Kwabena Kwaku Kwame Paa-Kwesi Yaw Edem Elikem Mawuli Senyo Atsu Delali Kafui "
        "Kweku Nii Selasi Yooku",
        "Asubonteng Dwumfour Gyamerah Kwaansa Nkrumasi Oteng-Bia Pobisu Sarfobea Tawiahene Wiafeku Agbenorto "
        "Dzokoto Fiagbor Kpodzie Lamptefio Ofosumensa",
    ),
    "Ireland": _country(
        "Galway Cork Limerick Sligo",
        "English Irish",
        "Aoife Bláthnaid Caoimhe Deirdre Eithne Fionnuala Gráinne Íde Líadan Muireann Niamh Órlaith Ríona Sorcha "
        "Aisling Bríd Clodagh Éabha Máire Nuala Róisín",
        "Aodhán Breandán Cathal Diarmuid Eoghan Fiachra Garbhán Iarla Lorcán Murchadh Oisín Pádraic Ruairí Tadhg "
        "Cormac Donncha Fergus Naoise Rónán Senan Turlough",
        "Ballynoe Carrowmoy Drumsallagh Eskerboy Finnaghty Glenmulvey Heskinan Kilbrannock Lisheenagh Mulrushy "
        "O'Tarpaigh Prunteen Roscallan Scullabeg Tullyvane Ummerane",
    ),
    "Georgia": _country(
        "Tbilisi Batumi Kutaisi Telavi",
        "Georgian",
        "Ana Dali Eka Ketevan Lamara Manana Natela Nino Pikria Rusudan Salome Tinatin Tsira Ia Darejan Eteri "
        "Guliko Khatuna Mzia Nestan Teona",
        "Archil Bachana Davit Elguja Gela Irakli Jaba Kakha Levan Mamuka Nodar Otar Revaz Shota Amiran Besik "
        "Goderdzi Ilia Merab Tariel Vakhtang",
        "Abzianeli Bochorashvidze Chkhetidani Darchiauri Elisbarani Gvazavadze Ioramidze Kereselani Lagvilauri "
        "Mchedlauri Nadareli Otiauri Samkharani Tokhadzeli Urushauri Zaalidze",
    ),
    "Peru": _country(
        "Arequipa Cusco Trujillo Iquitos",
        "Spanish Quechua",
        "Alondra Bárbara Consuelo Dorotea Esmeralda Fabiola Herminia Illari Jimena Killa Leticia Maritza Nayeli "
        "Ofelia Paloma Qori Rosaura Sayri Teodora Urpi Yolanda",
        "Amaru Basilio Ciro Demetrio Eusebio Florentino Gregorio Hilario Inti Jacobo Leoncio Melchor Nazario "
        "Octavio Pascual Quispe Rómulo Saturnino Tupaq Uriel Wilfredo",
        "Anccasi Ccorimanya Chuquihuayta Huamanrayme Illatarco Jalcapoma Llacsahuanga Mayuntupa Ñaupari "
        "Orccohuarca Pumacallao Quillahuaman Ruminahui Sallqapata Tintaycusi Yanaricra",
    ),
    "Belgium": _country(
        "Ghent Antwerp Bruges Leuven",
        "Dutch French German",
        "Annelies Bieke Cato Dorien Els Fien Griet Heleen Ilse Joke Katrijn Lieve Marleen Noor Britt Hilde "
        "Karlijn Mieke Petra Saskia Veerle",
        "Arne Bavo Cyriel Dries Emiel Floris Geert Hendrik Jorik Koen Lander Maarten Niels Pieter Bram Gijs Joost "
        "Lode Rik Stijn Wout",
        "Vanderhoeck Boerlinck Claeverbos Dewaterloos Eeckhautte Frederickx-Mol Goemaerts Hollevoort Kerselaere "
        "Lindenboogh Meulebrugge Nachtegaele Overmeersch Pypersdal Rysselinck Vantorreman",
    ),
}


@dataclasses.dataclass(frozen=True)
class Profession:
    """What a person does, and what goes with it: the kind of work, the emblem on the awards, the field of study."""

    title: str
    work: str
    emblem: str
    study: str


PROFESSIONS = tuple(
    Profession(*row)
    for row in table(
        """novelist | novel | Quill | literature
poet | poetry collection | Verse | philology
film director | film | Lens | cinematography
composer | symphony | Lyre | music
playwright | play | Curtain | drama
painter | painting | Palette | art
sculptor | sculpture | Chisel | art
photographer | photo series | Shutter | photography
choreographer | ballet | Slipper | dance
architect | building | Keystone | architecture
chef | cookbook | Ladle | gastronomy
historian | history book | Chronicle | history
journalist | reportage | Headline | journalism
marine biologist | popular science book | Coral | biology
astronomer | star atlas | Comet | astronomy
botanist | plant guide | Fern | botany
game designer | board game | Dice | design
fashion designer | clothing collection | Thimble | textiles"""
    )
)

PARENT_JOBS = cells(
    """baker, bus driver, carpenter, dentist, electrician, farmer, firefighter, florist, gardener, judge, librarian,
    mechanic, midwife, nurse, pharmacist, pilot, plumber, postal worker, shoemaker, surgeon, tailor, translator,
    veterinarian, watchmaker""",
    ",",
)

HOBBIES = cells(
    """archery, beekeeping, birdwatching, bookbinding, calligraphy, chess, fencing, gardening, kayaking, kite flying,
    knitting, model railways, mushroom picking, origami, pottery, rock climbing, sailing, stargazing, table
    tennis, woodcarving""",
    ",",
)

INSTRUMENTS = cells(
    """accordion banjo bassoon cello clarinet flute guitar harmonica harp mandolin oboe piano saxophone trombone
    trumpet violin"""
)

LANGUAGES = cells(
    """Arabic Czech Dutch Finnish French German Greek Hebrew Hungarian Italian Japanese Korean Mandarin Persian
    Polish Portuguese Romanian Russian Spanish Swedish Thai Turkish Ukrainian Vietnamese"""
)

AWARD_COLOURS = cells("Amber Azure Bronze Crimson Emerald Golden Ivory Jade Scarlet Silver")

TITLE_ADJECTIVES = cells(
    """Ashen Borrowed Brittle Copper Crooked Distant Drowsy Feathered Folded Forgotten Hollow Inverted Moonlit
    Nameless Paper Restless Salted Sleepless Tangled Unlit Velvet Wandering Weightless Woven"""
)

TITLE_NOUNS = cells(
    """Almanac Anchor Bridge Candle Carousel Cartographer Compass Estuary Ferry Garden Granary Harbour Hourglass
    Kettle Lantern Lighthouse Meadow Mirror Orchard Parlour Quarry Staircase Threshold Windmill"""
)

MONTHS = cells("January February March April May June July August September October November December")
