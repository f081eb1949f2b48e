"""The grammars of the corpus: a slot's name to its alternatives.

An alternative is plain words and ``{slot}`` references. Slots whose alternatives should come more
often list them more than once.
"""

from __future__ import annotations

Grammar = dict[str, tuple[str, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(line.split()) for line in text.strip().splitlines())


ENGLISH: Grammar = {
    "digit": _words("zero one two three four five six seven eight nine"),
    "unit": _words("one two three four five six seven eight nine"),
    "teen": _words(
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    ),
    "tens": _words("twenty thirty forty fifty sixty seventy eighty ninety"),
    "below_hundred": ("{unit}", "{teen}", "{tens}", "{tens} {unit}", "{tens} {unit}"),
    "number": (
        "{below_hundred}",
        "{below_hundred}",
        "{unit} hundred",
        "{unit} hundred and {below_hundred}",
        "{below_hundred} thousand",
        "{unit} thousand {unit} hundred",
        "{unit} million",
    ),
    "decimal": ("{below_hundred} point {digit}", "{digit} point {digit} {digit}"),
    "digits": (
        "{digit} {digit}",
        "{digit} {digit} {digit}",
        "{digit} {digit} {digit} {digit}",
        "{digit} {digit} {digit} {digit} {digit}",
        "{digit} {digit} {digit} {digit} {digit} {digit}",
    ),
    "ordinal": _words(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
    ),
    "day_number": (
        "{ordinal}",
        "thirteenth",
        "fourteenth",
        "fifteenth",
        "twentieth",
        "twenty {ordinal_unit}",
        "thirtieth",
    ),
    "ordinal_unit": _words("first second third fourth fifth sixth seventh eighth ninth"),
    "hour": _words("one two three four five six seven eight nine ten eleven twelve"),
    "minute": (
        "oh five",
        "ten",
        "fifteen",
        "twenty",
        "twenty five",
        "thirty",
        "forty",
        "forty five",
        "fifty",
        "fifty five",
    ),
    "time": (
        "{hour} {minute}",
        "{hour} {minute}",
        "{hour} {minute} in the {part}",
        "{hour} in the {part}",
        "half past {hour}",
        "quarter past {hour}",
        "quarter to {hour}",
        "{teen} minutes past {hour}",
        "noon",
        "midnight",
    ),
    "part": _words("morning afternoon evening"),
    "day": _words("monday tuesday wednesday thursday friday saturday sunday"),
    "month": _words(
        "january february march april may june july august september october november december"
    ),
    "date": ("{month} {day_number}", "the {day_number} of {month}", "{day} {month} {day_number}"),
    "when": ("today", "tomorrow", "tonight", "on {day}", "next {day}", "this weekend", "next week"),
    "name": _words(
        "anna maria peter john david sarah michael laura james emma oliver sophia daniel julia "
        "robert alice thomas helen martin clara victor diana george nina henry rosa frank olga "
        "simon irene oscar linda walter monica arthur susan philip teresa edward paula hector "
        "naomi samuel grace leon vera ivan judith kevin amelia"
    ),
    "relative": _words("mother father sister brother doctor boss neighbor teacher"),
    "person": ("{name}", "{name}", "{name}", "my {relative}"),
    "city": _words(
        "london paris berlin madrid tokyo boston chicago lisbon vienna toronto dublin sydney "
        "moscow rome oslo cairo"
    ),
    "place": _words(
        "home work airport station hospital library bank hotel restaurant market park museum gym "
        "bakery pharmacy beach school theater church harbor"
    ),
    "room": (
        "kitchen",
        "bedroom",
        "bathroom",
        "living room",
        "garage",
        "garden",
        "hallway",
        "office",
        "basement",
        "attic",
    ),
    "device": _words(
        "lights lamp fan heater radio television oven alarm speaker camera computer printer "
        "dishwasher sprinkler"
    ),
    "opening": _words("door window blinds curtains gate drawer valve"),
    "color": _words("red blue green yellow orange purple white pink black brown gray"),
    "music": _words("jazz rock classical folk country blues piano guitar violin dance"),
    "item": _words(
        "bread milk eggs butter cheese apples bananas rice sugar coffee tea tomatoes potatoes "
        "onions chicken fish soap water lemons carrots flour honey pepper salt chocolate"
    ),
    "measure": _words("pounds grams cups bottles boxes bags packs liters spoons"),
    "period": _words("seconds minutes hours days weeks months years"),
    "money": _words("dollars euros pounds cents"),
    "distance": _words("miles kilometers meters feet"),
    "event": _words(
        "meeting lunch dinner breakfast appointment class party concert interview game flight "
        "train wedding lesson conference"
    ),
    "weather": _words("rain snow sunny windy cloudy cold warm storm fog"),
    "operator": ("plus", "minus", "times", "divided by"),
    "animal": _words("dog cat horse bird rabbit lion tiger elephant"),
    "code": _words("alpha bravo charlie delta echo foxtrot hotel india kilo lima sierra tango"),
    "news": (
        "i will be late",
        "i am on my way",
        "i cannot come {when}",
        "see you at {time}",
        "happy birthday",
        "thank you very much",
        "please call me back",
        "the {event} is at {time}",
        "i will be home at {time}",
        "dinner is ready",
    ),
    "control": _phrases("""
        play
        pause
        stop
        resume
        next song
        previous song
        volume up
        volume down
        louder please
        be quiet
        mute the {device}
        repeat that
        go back
        cancel
        yes please
        no thank you
        okay
        help me
        start again
        continue
        open the {opening}
        close the {opening}
        lock the {opening}
    """),
    "sentence": _phrases("""
        {digits}
        {digits}
        {number}
        {control}
        {control}
        {name} and {name}
        {code} {code} {digit} {digit}
        set a timer for {below_hundred} {period}
        set a timer for {unit} and a half hours
        set an alarm for {time}
        set an alarm for {time} on {day}
        wake me up at {time}
        wake me up {when} at {time}
        remind me to call {person} at {time}
        remind me to buy {item} {when}
        remind me about the {event} on {day}
        remind me in {below_hundred} {period}
        call {person}
        call {person} at {time}
        call {person} {when}
        dial {digit} {digit} {digit} {digit} {digit}
        send a message to {person}
        tell {person} {news}
        write to {person} {news}
        ask {person} about the {event}
        email {person} the report for {month}
        turn on the {device}
        turn off the {device}
        turn on the {device} in the {room}
        turn off the {device} in the {room}
        turn the {room} lights {color}
        dim the lights to {below_hundred} percent
        make the {room} {below_hundred} degrees
        set the temperature to {below_hundred} degrees
        set the {device} to {below_hundred}
        open the {room} {opening}
        close the {room} {opening}
        is the {opening} in the {room} closed
        play some {music} music
        play some {music} in the {room}
        play channel {below_hundred}
        play the {ordinal} song again
        skip to track {below_hundred}
        what is the weather in {city}
        what is the weather like {when}
        will it be {weather} in {city} {when}
        how {weather} is it in {city}
        what time is it in {city}
        when is the next train to {city}
        book a flight to {city} on {date}
        book a table for {unit} at {time}
        find a hotel in {city} for {unit} nights
        where is the nearest {place}
        how far is the {place} from here
        navigate to the {place}
        drive me to the {place} in {city}
        turn left after {number} {distance}
        turn right at the {place}
        take the {ordinal} exit on the left
        go straight for {below_hundred} {distance}
        the gate number is {digit} {digit}
        add {item} to my shopping list
        add {item} and {item} to the list
        remove {item} from my list
        buy {below_hundred} {measure} of {item}
        order {unit} {measure} of {item}
        we need more {item} and {item}
        how much is {number} {money}
        pay {person} {number} {money}
        transfer {number} {money} to {person}
        what is {below_hundred} {operator} {below_hundred}
        convert {number} {distance} to {distance}
        the answer is {decimal}
        my number is {digits}
        the code is {digits}
        room {digit} {digit} {digit}
        page {number}
        my birthday is on {date}
        today is {day} {month} {day_number}
        schedule the {event} with {person} on {day}
        move the {event} to {time}
        cancel the {event} on {date}
        when is the {event} with {person}
        what is on my calendar {when}
        who is coming to the {event}
        read my new messages from {person}
        read the news about {city}
        show me pictures of the {animal}
        how many {animal} pictures are there
        feed the {animal} at {time}
        the {color} {animal} is in the {room}
        i want a {color} {device}
        bring the {color} {item} please
        translate this page for {name}
        good morning {name}
        good night {name}
        hello my name is {name}
        happy birthday {name}
    """),
}

SPANISH: Grammar = {
    "digit": _words("cero uno dos tres cuatro cinco seis siete ocho nueve"),
    "unit": _words("dos tres cuatro cinco seis siete ocho nueve"),
    "teen": _words("diez once doce trece catorce quince dieciséis diecisiete dieciocho diecinueve"),
    "tens": _words("veinte treinta cuarenta cincuenta sesenta setenta ochenta noventa"),
    "above_thirty": _words("treinta cuarenta cincuenta sesenta setenta ochenta noventa"),
    "twenties": _words("veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis"),
    "below_hundred": (
        "{unit}",
        "{teen}",
        "{tens}",
        "{twenties}",
        "{above_thirty} y {unit}",
        "{above_thirty} y {unit}",
    ),
    "hundreds": _words(
        "doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos "
        "novecientos"
    ),
    "number": ("{below_hundred}", "{below_hundred}", "cien", "{hundreds}", "{unit} mil"),
    "digits": (
        "{digit} {digit}",
        "{digit} {digit} {digit}",
        "{digit} {digit} {digit} {digit}",
        "{digit} {digit} {digit} {digit} {digit}",
    ),
    "hour": _words("dos tres cuatro cinco seis siete ocho nueve diez once doce"),
    "time": (
        "las {hour}",
        "las {hour} y media",
        "las {hour} y cuarto",
        "las {hour} y {teen}",
        "las {hour} de la {part}",
        "la una",
    ),
    "part": _words("mañana tarde noche"),
    "day": _words("lunes martes miércoles jueves viernes sábado domingo"),
    "month": _words(
        "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre"
    ),
    "date": ("el {unit} de {month}", "el {teen} de {month}", "el {twenties} de {month}"),
    "when": ("hoy", "mañana", "esta noche", "el {day}", "el próximo {day}"),
    "name": _words(
        "ana maría pedro juan david sara miguel laura jaime carmen lucía daniel julia roberto "
        "alicia tomás elena martín clara víctor rosa pablo sofía carlos isabel"
    ),
    "room": _words("cocina sala oficina terraza entrada"),
    "device": ("luz", "lámpara", "radio", "televisión", "música", "calefacción", "alarma"),
    "opening": _words("puerta ventana persiana cortina"),
    "item": _words("pan leche huevos queso manzanas arroz azúcar café agua tomates pollo pescado"),
    "place": ("estación", "farmacia", "playa", "escuela", "biblioteca", "casa", "plaza"),
    "city": _words("madrid barcelona sevilla valencia lima bogotá santiago londres parís"),
    "period": _words("segundos minutos horas días semanas"),
    "control": _phrases("""
        para
        sigue
        espera
        sí por favor
        no gracias
        más alto
        más bajo
        otra vez
        siguiente canción
        sube el volumen
        baja el volumen
        ayuda
        abre la {opening}
        cierra la {opening}
    """),
    "sentence": _phrases("""
        {digits}
        {digits}
        {number}
        {control}
        {control}
        pon un temporizador de {below_hundred} {period}
        pon una alarma a {time}
        despiértame {when} a {time}
        despiértame a {time}
        llama a {name}
        llama a {name} a {time}
        llama a {name} {when}
        manda un mensaje a {name}
        dile a {name} que llego tarde
        dile a {name} que llego a {time}
        enciende la {device}
        apaga la {device}
        enciende la {device} de la {room}
        apaga la {device} de la {room}
        abre la {opening} de la {room}
        cierra la {opening} de la {room}
        pon la {device} a {below_hundred} grados
        qué tiempo hace en {city}
        qué tiempo hace {when} en {city}
        qué hora es en {city}
        dónde está la {place}
        a qué hora sale el tren a {city}
        cómo llego a la {place}
        añade {item} a la lista
        compra {item} y {item}
        necesito {below_hundred} {item}
        mi número es {digits}
        el código es {digits}
        cuánto es {below_hundred} más {below_hundred}
        cuánto es {below_hundred} menos {unit}
        recuérdame llamar a {name} {when}
        recuérdame comprar {item} {when}
        la reunión es {date}
        la reunión es {when} a {time}
        mi cumpleaños es {date}
        gira a la derecha en la {place}
        gira a la izquierda en la {place}
        sigue {number} metros
        buenos días {name}
        buenas noches {name}
        hola me llamo {name}
    """),
}
